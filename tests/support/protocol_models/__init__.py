"""The checkpoint protocol as models whose every state is visited."""
