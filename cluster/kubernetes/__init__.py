"""Runs on Kubernetes with KubeRay: render manifests, apply them, follow RayJobs. Must import neither torch nor ray."""
