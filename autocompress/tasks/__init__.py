"""What is compressed and how it is judged.

>>> from autocompress.tasks import load_task
>>> task = load_task("digits")  # doctest: +SKIP
>>> task.model_name, len(task.split("test"))  # doctest: +SKIP
('resnet8', 370)
"""

from autocompress.tasks.load import load_task

__all__ = ["load_task"]
