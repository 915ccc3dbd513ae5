"""What a process that is started with a stream does."""

from multiprocessing.connection import Connection

from megacode.data.stream import TrainStream


def send_samples(connection: Connection, stream: TrainStream, numbers: list[int]) -> None:
    """Send the tokens of samples."""
    connection.send([stream.sample(number).tokens.tolist() for number in numbers])
