-- Run once by the Postgres image when its volume is empty; the database `dagster` is made by POSTGRES_DB.
CREATE DATABASE mlflow;
