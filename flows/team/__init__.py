"""The team on one machine: Prefect, MLflow and a worker, which outlive the command that starts them."""
