"""A connection to a server, as a transport of `engine.methods`.

Each call is a gRPC call of its own on one shared channel (tritonclient's own stream object allows one stream a client),
so that streams are independent, cancelled one by one, and paused by HTTP/2's flow control while they are not read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from engine.client import wire
from engine.contract import STUDY_MODEL, Tensor
from engine.errors import M3DError
from engine.methods import File, Outputs

READY_S = 5.0  # that is waited for a server to say that it is ready


class Connection:
    """A gRPC channel to one server. Thread-safe. The calls raise engine.errors only."""

    def __init__(self, url: str):
        self.url = url
        self._channel = grpc.insecure_channel(url, options=wire.OPTIONS)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        for name, kind, response in (
            ("ModelInfer", self._channel.unary_unary, service_pb2.ModelInferResponse),
            ("ModelStreamInfer", self._channel.stream_stream, service_pb2.ModelStreamInferResponse),
        ):
            call = kind(f"/{wire.SERVICE}/{name}", wire.InferRequest.serialized, response.FromString)
            setattr(self.stub, name, call)
        self._closed = False

    def close(self) -> None:
        """Close the channel; calls in progress end with Cancelled."""
        self._closed = True
        self._channel.close()

    def is_ready(self) -> bool:
        """Whether the server is there with all its models."""
        try:
            return self.call("ServerReady", service_pb2.ServerReadyRequest(), READY_S).ready
        except M3DError:
            return False

    def work(self, function: Callable, *arguments: Any) -> Any:
        return function(*arguments)

    def call(self, method: str, request, timeout: float | None):
        """A unary call of Triton's service."""
        self._check_open()
        try:
            return getattr(self.stub, method)(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self.error(error) from None

    def infer(self, model: str, inputs: Mapping[Tensor, object], timeout: float | None) -> Outputs:
        """One request, one response."""
        return wire.outputs_of(self.call("ModelInfer", wire.request_of(model, inputs), timeout))

    def upload(self, file: File, inputs: Mapping[Tensor, object], timeout: float | None) -> Outputs:
        """A scan, in parts if it is large, and what comes with it."""
        return self.infer_in_turn(STUDY_MODEL, wire.upload_requests(file.take(), inputs), timeout)

    def infer_in_turn(self, model: str, parts: Iterable[Mapping[Tensor, object]], timeout: float | None) -> Outputs:
        """Requests in their order, none of which waits for the response to the one before; the last response.

        They are let go once the last is sent. The first that fails ends it all.
        """
        self._check_open()
        requests = [wire.request_of(model, inputs) for inputs in parts]
        wanted, waiting = len(requests), iter(requests)
        del requests  # the iterator has them until the last is sent
        responses = list(ResponseStream(self, self.stub.ModelStreamInfer(waiting, timeout=timeout), alone=wanted == 1))
        if len(responses) < wanted:
            raise wire.too_few(len(responses), wanted)
        return responses[-1]

    def stream(self, model: str, inputs: Mapping[Tensor, object], timeout: float | None) -> ResponseStream:
        """One request to a decoupled model, any number of responses. Sent at once."""
        self._check_open()
        call = self.stub.ModelStreamInfer(iter((wire.request_of(model, inputs),)), timeout=timeout)
        return ResponseStream(self, call, alone=True)

    def error(self, error: grpc.RpcError, cancelled: bool = False) -> M3DError:
        """The typed error that a failed call stands for. cancelled: whether this side cancelled it."""
        return wire.call_error(self.url, error, cancelled or self._closed)

    def _check_open(self) -> None:
        if self._closed:
            raise wire.closed(self.url)


class ResponseStream(Iterator[Outputs]):
    """The responses of one streaming call, as dicts of output name to array. Cancelled by `close`, or when dropped.

    alone: that one request is all that is sent, so that an error is the last response.
    """

    def __init__(self, connection: Connection, call, alone: bool):
        self._connection = connection
        self._alone = alone
        self._call = call
        self._cancelled = False

    def __next__(self) -> Outputs:
        try:
            message = next(self._call)
        except grpc.RpcError as error:
            raise self._connection.error(error, self._cancelled) from None
        if message.error_message:
            self.finish() if self._alone else self.close()
            raise wire.server_error(message.error_message)
        return wire.outputs_of(message.infer_response)

    def read(self) -> Outputs | None:
        """The next one; None after the last."""
        return next(self, None)

    def finish(self) -> None:
        """Read to the end of a stream whose last response has come, or failed.

        Triton 2.51 keeps the socket of a call that is cancelled between its last response and its end.
        """
        with contextlib.suppress(grpc.RpcError):
            for _ in self._call:
                pass

    def close(self) -> None:
        self._cancelled = True
        self._call.cancel()

    def __del__(self):
        self._call.cancel()
