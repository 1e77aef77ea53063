"""The registry: what was made, in MLflow.

`home` says where things lie, `index` answers from local files, `record` writes executions and their steps, `family`
publishes models and moves their aliases, `gates` decides whether they may, `pull` hands an artifact out. Importing any
of them does not import MLflow; it is opened by the first call that needs it.
"""
