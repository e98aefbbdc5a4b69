"""Azure Machine Learning as target: the only place that imports azure."""
