"""One value or one pure function at a time; no service, no process."""
