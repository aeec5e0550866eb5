#!/usr/bin/env bash
# Two runs on a real Kubernetes with KubeRay: one is left alone, the other loses a worker's pod, is suspended and resumed.
# Both must end with the same bits. For a machine with docker, kubectl, helm, and kind or k3d; half an hour the first time.
#
#   make k8s-e2e                 or, for the parts of it:
#   k8s/e2e.sh print NAME        what is applied for the run NAME; needs kubectl alone
#   k8s/e2e.sh reader            the pod that compares
#
# KEEP=1 leaves the cluster there. IMAGE=… takes an image that is built. TORCH_INDEX is handed on to the build, for
# torch's CPU builds. The user's kubeconfig is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

CLUSTER=outlast-e2e
NAMESPACE=outlast-e2e
KUBERAY=1.7.0
BUILT=${IMAGE:-}
IMAGE=${IMAGE:-outlast:e2e-$(date +%s)}
STEPS=4000 # long enough to be killed and suspended in

say() { printf '\n== %s\n' "$*" >&2; }

die() {
  say "FAILED: $*"
  exit 1
}

# The dev overlay under another name, with more steps; each run has a claim of its own.
manifests() {
  kubectl kustomize k8s/overlays/dev |
    sed -e "s/my-run/$1/g" -e "s#image: outlast:0.1.0#image: $IMAGE#" -e "s/steps: 400,/steps: $STEPS,/" \
      -e 's/every: 50,/every: 200,/'
}

reader() {
  cat <<EOF
apiVersion: v1
kind: Pod
metadata: {name: reader}
spec:
  restartPolicy: Never
  automountServiceAccountToken: false
  securityContext: {runAsNonRoot: true, runAsUser: 1000, fsGroup: 1000, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: reader
      image: $IMAGE
      command: [sleep, infinity]
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
      volumeMounts:
        - {name: calm, mountPath: /calm}
        - {name: troubled, mountPath: /troubled}
  volumes:
    - {name: calm, persistentVolumeClaim: {claimName: calm-storage}}
    - {name: troubled, persistentVolumeClaim: {claimName: troubled-storage}}
EOF
}

case ${1:-} in
  print)
    manifests "${2:?a name}"
    exit
    ;;
  reader)
    reader
    exit
    ;;
  '') ;;
  *) die "unknown component $1" ;;
esac

for tool in docker kubectl helm outlast; do
  command -v "$tool" >/dev/null || die "$tool is not on the PATH"
done
if command -v kind >/dev/null; then
  MAKER=kind
elif command -v k3d >/dev/null; then
  MAKER=k3d
else
  die "neither kind nor k3d is on the PATH"
fi

WORK=$(mktemp -d)
export KUBECONFIG=$WORK/kubeconfig

clean() {
  code=$?
  if [[ -z ${MADE:-} ]]; then # there was one of this name already, or none was made
    rm -rf "$WORK"
    exit "$code"
  fi
  if [[ $code != 0 ]]; then
    kubectl -n "$NAMESPACE" get rayjob,raycluster,pod -o wide >&2 || true
    kubectl -n "$NAMESPACE" get events --sort-by=.lastTimestamp 2>/dev/null | tail -n 30 >&2 || true
  fi
  if [[ -n ${KEEP:-} ]]; then
    say "the cluster stays: KUBECONFIG=$KUBECONFIG; delete it with: $MAKER cluster delete $CLUSTER (kind: --name)"
    exit "$code"
  fi
  if [[ $MAKER == kind ]]; then kind delete cluster --name "$CLUSTER"; else k3d cluster delete "$CLUSTER"; fi || true
  rm -rf "$WORK"
  exit "$code"
}
trap clean EXIT

# until_true SECONDS WHAT COMMAND…: asks every two seconds.
until_true() {
  local limit=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    ((SECONDS < limit)) || die "not in time: $what"
    sleep 2
  done
}

status_of() { kubectl -n "$NAMESPACE" get rayjob "$1" -o "jsonpath={.status.jobDeploymentStatus}"; }

is_suspended() { [[ $(status_of "$1") == Suspended ]]; }

is_done() {
  case $(status_of "$1") in
    Complete) return 0 ;;
    Failed | ValidationFailed) die "rayjob/$1: $(kubectl -n "$NAMESPACE" get rayjob "$1" -o 'jsonpath={.status.message}')" ;;
    *) return 1 ;;
  esac
}

pod_of() { # RUN TYPE: a pod that runs
  kubectl -n "$NAMESPACE" get pod -l "outlast/run=$1,ray.io/node-type=$2" --field-selector status.phase=Running -o name |
    head -n 1
}

num_commits() { # RUN: checkpoints that are committed, of all attempts
  local head
  head=$(pod_of "$1" head)
  [[ -n $head ]] || return 0
  kubectl -n "$NAMESPACE" exec "$head" -c ray-head -- \
    bash -c "compgen -G '/data/runs/$1/attempts/*/checkpoint-*/manifest.json' | wc -l" 2>/dev/null || true
}

has_commits() { # RUN COUNT
  local found
  found=$(num_commits "$1")
  ((${found:-0} >= $2))
}

has_attempts() { # RUN COUNT
  local head found
  head=$(pod_of "$1" head)
  [[ -n $head ]] || return 1
  found=$(kubectl -n "$NAMESPACE" exec "$head" -c ray-head -- \
    bash -c "compgen -G '/data/runs/$1/attempts/*/claim.json' | wc -l" 2>/dev/null) || return 1
  ((found >= $2))
}

if [[ -z $BUILT ]]; then
  say "building $IMAGE"
  docker build --file k8s/Dockerfile --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" --tag "$IMAGE" .
fi

say "a cluster, by $MAKER"
if [[ $MAKER == kind ]]; then
  kind create cluster --name "$CLUSTER" --wait 180s
  MADE=1
  kind load docker-image --name "$CLUSTER" "$IMAGE"
else
  k3d cluster create "$CLUSTER" --wait --timeout 180s --kubeconfig-update-default=false
  MADE=1
  k3d kubeconfig get "$CLUSTER" >"$KUBECONFIG"
  k3d image import --cluster "$CLUSTER" "$IMAGE"
fi

say "KubeRay $KUBERAY"
helm upgrade --install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm/ \
  --version "$KUBERAY" --namespace kuberay --create-namespace --wait --timeout 5m

kubectl create namespace "$NAMESPACE"
kubectl label namespace "$NAMESPACE" pod-security.kubernetes.io/enforce=restricted

say "the run that is left alone"
manifests calm | outlast k8s apply - --namespace "$NAMESPACE"
until_true 1800 "calm is done" is_done calm

say "the run that is not"
manifests troubled | outlast k8s apply - --namespace "$NAMESPACE"
until_true 900 "a checkpoint" has_commits troubled 1
victim=$(pod_of troubled worker)
[[ -n $victim ]] || die "there is no worker to kill"
say "killing $victim"
kubectl -n "$NAMESPACE" delete "$victim" --grace-period=0 --force
until_true 600 "another attempt" has_attempts troubled 2
outlast k8s status troubled --namespace "$NAMESPACE"

say "suspending it"
outlast k8s suspend troubled --namespace "$NAMESPACE"
until_true 300 "suspended" is_suspended troubled
outlast k8s resume troubled --namespace "$NAMESPACE"
until_true 1800 "troubled is done" is_done troubled

say "comparing"
reader | kubectl -n "$NAMESPACE" apply --server-side -f -
kubectl -n "$NAMESPACE" wait --for=condition=Ready pod/reader --timeout=180s
read_run() { kubectl -n "$NAMESPACE" exec reader -- outlast "$@"; }
read_run status /troubled/runs/troubled --json >"$WORK/status.json"
read_run checkpoints diff /calm/runs/calm newest newest --with /troubled/runs/troubled --optimizer --json >"$WORK/diff.json"
python3 - "$WORK/status.json" "$WORK/diff.json" <<'EOF'
import json, sys

status, diff = (json.load(open(path)) for path in sys.argv[1:])
assert status["state"] == "done", status["state"]
assert status["attempts"] >= 3, f"{status['attempts']} attempts: the faults came too late"
changes = [row for row in diff["tensors"] if row["change"] != "equal"]
assert diff["tensors"] and not changes, changes[:5]
print(f"{len(diff['tensors'])} tensors are equal after {status['attempts']} attempts, {status['lost_steps']} steps done again")
EOF
say "the same bits"
