"""What the Ray of the tests starts in place of its worker: a process that has a server fork the real one.

python ray_worker.py ARGUMENTS-OF-RAYS-WORKER        (see forks.py)
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from forks import become_a_fork

CODE = """
import runpy, sys
sys.argv = {arguments}
sys.path[0] = {directory!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""

if __name__ == "__main__":
    ray = find_spec("ray")
    assert ray is not None and ray.origin is not None
    worker = Path(ray.origin).parent / "_private/workers/default_worker.py"
    arguments = [str(worker), *sys.argv[1:]]
    become_a_fork(CODE.format(arguments=arguments, directory=str(worker.parent)))
