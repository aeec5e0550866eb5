import sys, time, tempfile, collections, resource
from pathlib import Path
import faulthandler; faulthandler.enable()
resource.setrlimit(resource.RLIMIT_AS,(8<<30,8<<30))
from tests.system.mutations.targets import Workshop, TARGETS
if __name__=="__main__":
    n0,n1=int(sys.argv[2]),int(sys.argv[3]); names=sys.argv[1].split(",") if sys.argv[1]!="all" else TARGETS
    with tempfile.TemporaryDirectory() as f:
        w=Workshop(Path(f))
        for t in names:
            c=collections.Counter(); faults={}; t0=time.time()
            for s in range(n0,n1):
                e=w.run(t,s); c[e.kind]+=1
                if e.fault: faults.setdefault(e.fault[:90],[]).append((s,e.fault))
            print(f"{t}: {dict(c)} {sum(map(len,faults.values()))} faults, {time.time()-t0:.1f} s", flush=True)
            for k,v in sorted(faults.items(), key=lambda x:-len(x[1]))[:12]: print("    ",len(v),v[0][0],v[0][1][:280].replace("\n","\\n"), flush=True)
