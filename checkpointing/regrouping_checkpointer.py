"""`RegroupingCheckpointer`: a checkpointer whose attempt may continue what the one before it held in memory."""

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.run_store.catalog import check_unread


class RegroupingCheckpointer(Checkpointer):
    """Checkpoints of one generation of a group that goes on in memory. Each generation claims the run anew."""

    def continue_in_memory(self, step: int) -> None:
        """Continue from the state after `step` steps of the attempt before this one, in place of `resume`.

        Every rank has that state in memory already. The checkpoints that count become the lineage: a step is a pure
        function, so the state in memory descends from each of them. Every rank calls it.

        Raises:
            StorageError: What cannot be read may be newer than the checkpoints that count.
        """
        check_unread(self._store, self.catalogue, self.catalogue.accepted[0].ref if self.catalogue.accepted else None)
        lineage = list(self.catalogue.accepted)
        if lineage and lineage[0].ref.step > step:
            raise StorageError(f"{lineage[0].ref} is newer than the state in memory, after {step} steps")
        self._has_resumed = True
        self._committer.lineage = lineage
        self._committer.unread = self.catalogue.unread_refs
        self._newest_begun = max([self._newest_begun, *(item.ref.step for item in lineage[:1])])

    def abandon(self) -> None:
        """Give up the save in flight, whose group is gone: nothing more of this attempt is waited for.

        Its thread ends by itself; what it may still commit counts only if no later attempt has claimed the run.
        """
        self._is_closed = True
        self._in_flight.abandon()
