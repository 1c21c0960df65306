"""The hand-off protocol as two state tables: a `Sender` on P, a `Receiver` on D. Pure.

Rules, numbered as the tests name them:

 1. A unit goes out only after the receiver has accepted the ticket.
 2. Units of a layer arrive in order and without a gap; the first that does not, or whose checksum
    is wrong, fences the ticket (P4).
 3. The receiver commits once, when every layer of every token has arrived and Done has been
    reached on the link; until then nobody reads the blocks (P4).
 4. Blocks are released by exactly one action, `Release`, and only when this side's link thread can
    touch them no more: after it confirmed the fence, or after it ended (P5, P7).
 5. A terminal state absorbs. Events of an unknown or ended ticket change nothing (P6); the receiver
    remembers ended tickets, so that a late offer is refused rather than left waiting.
 6. Every live ticket has a deadline, and reaching it fences the ticket (P1).

Peers never write into blocks: they write into a link's staging buffer, and this node's own link
thread copies from it. So a fence needs no answer from the peer, and a dead peer cannot hold memory.
"""

from kvtransfer.protocol.receiver import Receiver, ReceiverState
from kvtransfer.protocol.sender import Sender, SenderState

__all__ = ["Receiver", "ReceiverState", "Sender", "SenderState"]
