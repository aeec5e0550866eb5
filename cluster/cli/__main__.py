"""Entry point of `python -m outlast.cluster.cli`. It must stay: applied RayJobs and submitted jobs start it."""

from outlast.cluster.cli.main import main

if __name__ == "__main__":
    main()
