"""What other libraries and launchers call things: the one place where foreign names and backends' names stand."""
