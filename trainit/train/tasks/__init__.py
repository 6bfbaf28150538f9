"""Multiple-choice tasks: questions from local files, answered by the likelihood of each choice."""

from trainit.train.tasks.answers import Answers as Answers
from trainit.train.tasks.answers import Request as Request
from trainit.train.tasks.questions import Task as Task
from trainit.train.tasks.questions import read as read
