# The version of this Python, and of the modules in it that make calls; for `sidebearer doctor`.
import importlib.metadata
import importlib.util
import re
import sys

print("%d.%d.%d" % sys.version_info[:3])
DISTRIBUTIONS = {"grpc": "grpcio"}


def is_a_part(name):
    """Whether something else that is installed needs it."""
    needs = (need for each in importlib.metadata.distributions() for need in each.requires or ())
    return any(re.match(name + r"(?![\w.-])", need) and "extra ==" not in need for need in needs)


for module in ("requests", "httpx", "aiohttp", "urllib3", "httplib2", "stripe", "grpc", "pip"):
    try:
        if not importlib.util.find_spec(module):
            continue
        # Nearly everybody has urllib3, as a part of requests, which brings it through the proxy.
        if module == "urllib3" and is_a_part(module):
            continue
        print(module, importlib.metadata.version(DISTRIBUTIONS.get(module, module)))
    except Exception:
        pass
