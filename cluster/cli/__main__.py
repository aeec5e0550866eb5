"""Entry point of `python -m outlast.cluster.cli`, which RayJobs and Ray jobs start."""

from outlast.cluster.cli.main import main

if __name__ == "__main__":
    main()
