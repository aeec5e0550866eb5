"""Worker groups of Ray Train that go on in memory when a worker is lost."""
