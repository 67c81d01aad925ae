"""Requests to language models: sent once, journalled, accounted for, and repeated where that helps.

Any server of OpenAI's protocol (`Endpoint`), its batch API (`BatchEndpoint`), or a model in this process
(`LocalModel`), behind one `Client`. Needs the extra [llm].
"""

from .client import Client, stream
from .cost import Ledger, Prices
from .endpoint import Endpoint, read_key
from .errors import BudgetReached, ServiceFailed, Stopped
from .request import Reply, Request
from .structured import Form, ParseError, ask_parsed

__all__ = [
    "BudgetReached", "Client", "Endpoint", "Form", "Ledger", "ParseError", "Prices", "Reply", "Request",
    "ServiceFailed", "Stopped", "ask_parsed", "read_key", "stream",
]  # fmt: skip
