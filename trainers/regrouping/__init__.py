"""How a training group goes on in memory when one of its members is lost."""
