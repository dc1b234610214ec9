"""What a run leaves behind: logs, tables, metrics, folders."""
