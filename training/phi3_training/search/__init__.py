"""Looks for better settings: many trainings with other recipe keys, the best kept as a recipe.

Reads search.yaml and the run's chats and base; writes run/search/. Optuna proposes the values.
"""
