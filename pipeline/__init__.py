"""The pipeline: what runs, in which order, where results live."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import rlhf_pipeline

del sys.path[0]
if sys.argv[:1] == [
    "-m"
]:  # `python -m pipeline.cli`, in whatever directory: before anything of ours is imported
    rlhf_pipeline.text_is_utf_8()
    rlhf_pipeline.own_packages_first()
