"""What does the plan in force do, and why that much memory? Text, Markdown, JSON and a picture of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tinybp_lightning.analysis import analyse
from tinybp_lightning.runtime.profile import PlanReport, StepProfile, format_bytes
from tinybp_lightning.runtime.torch.session import targets
from tinybp_lightning.schedule.simulate import simulate
from tinybp_lightning.schedule.text import to_text
