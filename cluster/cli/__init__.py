"""The command line. A command reads its arguments, calls one function and prints its result; no logic belongs here."""
