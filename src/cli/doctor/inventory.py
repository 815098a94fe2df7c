# The version of this Python, and of the modules in it that make calls; for `sidebearer doctor`.
import importlib.metadata
import importlib.util
import sys

print("%d.%d.%d" % sys.version_info[:3])
DISTRIBUTIONS = {"grpc": "grpcio"}
for module in ("requests", "httpx", "aiohttp", "urllib3", "httplib2", "stripe", "grpc", "pip"):
    try:
        if not importlib.util.find_spec(module):
            continue
        distribution = importlib.metadata.distribution(DISTRIBUTIONS.get(module, module))
        # Nearly everybody has urllib3, as a part of requests. It matters by itself only where somebody asked for it.
        if module == "urllib3" and distribution.read_text("REQUESTED") is None:
            continue
        print(module, distribution.version)
    except Exception:
        pass
