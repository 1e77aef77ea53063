"""The team on one machine: a Prefect server, an MLflow server and a worker that outlive the command that started them."""
