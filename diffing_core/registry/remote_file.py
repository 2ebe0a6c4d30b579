"""A file of a dataset on the hub that is read where it lies, by ranges: what nobody reads is not fetched."""

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from diffing_core.registry.sources import HubRef

READ_AHEAD_BYTES = 2**20  # a request takes about as long as this much of its answer


@dataclass(frozen=True)
class RemoteFile:
    """A file by its path in a dataset's repository; `place` names a commit, so that all ranges are of one version."""

    place: HubRef
    path: str

    @property
    def name(self) -> str:
        """Its last part."""
        return PurePosixPath(self.path).name

    def open(self, read_ahead_bytes: int = READ_AHEAD_BYTES) -> BinaryIO:
        """Its bytes. What is read is kept nowhere, so it is fetched again at the next reading."""
        from huggingface_hub import HfFileSystem, constants

        hub = HfFileSystem(endpoint=constants.ENDPOINT)
        return hub.open(f"datasets/{self.place.repo}@{self.place.revision}/{self.path}", block_size=read_ahead_bytes)
