"""Ray jobs and their supervisor."""
