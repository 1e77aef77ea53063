"""Language models: checkpoints, chat templates, runtimes and scores that several rooms share."""
