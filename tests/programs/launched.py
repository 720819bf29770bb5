"""Two processes of all training programs, one after the other: the launched side of test_launched.py.

accelerate launch --multi_gpu --num_processes 2 ... tests/programs/launched.py '{"slice_out": ["--max_steps", ...]}'
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from program_runs import program_of

from hf_efx.programs import frame

if __name__ == "__main__":
    end, frame.end_processes = frame.end_processes, lambda: None  # the group serves all
    commands = json.loads(sys.argv[1])
    for i, (name, argv) in enumerate(commands.items(), 1):
        if i == len(commands):
            frame.end_processes = end
        assert program_of(name)(argv) == 0
