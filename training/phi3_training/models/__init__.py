"""The base models that a recipe can name, and how their weights get here.

`catalogue` lists them; `small` fetches the pretrained model that needs no model hub; `fuse` turns
Llama-class weights into Phi-3's architecture. Writes only into the cache folder.
"""
