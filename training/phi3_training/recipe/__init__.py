"""A recipe: what to train on what, how it is judged and how it is served."""

from .azure import AzureSection as AzureSection
from .loading import Recipe as Recipe
from .loading import azure_section_of as azure_section_of
from .loading import load_recipe as load_recipe
from .loading import read_yaml as read_yaml
from .loading import replaced_with_chats as replaced_with_chats
from .loading import save_recipe as save_recipe
from .sections import AuditRule as AuditRule
from .sections import BaseSection as BaseSection
from .sections import ConnectionSection as ConnectionSection
from .sections import DataSection as DataSection
from .sections import EvaluateSection as EvaluateSection
from .sections import FinetuneSection as FinetuneSection
from .sections import GateRule as GateRule
from .sections import GateSection as GateSection
from .sections import HubSet as HubSet
from .sections import ModelSection as ModelSection
from .sections import RefusalRule as RefusalRule
from .sections import ServeSection as ServeSection
from .sections import Source as Source
