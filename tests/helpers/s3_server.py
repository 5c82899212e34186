"""A local server that speaks the protocol of Amazon S3."""

import json
import logging
import os
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock
from uuid import uuid4

from separation.batch.stores import store

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


class Bucket:
    """An empty bucket, and what a test asks for beside the program."""

    def __init__(self, files: Any, server: "Server") -> None:
        self.name = f"bucket-{uuid4().hex[:12]}"
        self.files = files
        self.server = server
        files.mkdir(self.name)

    def __str__(self) -> str:
        return f"s3://{self.name}"

    def put(self, key: str, content: bytes) -> None:
        self.files.pipe_file(f"{self.name}/{key}", content)

    def get(self, key: str) -> bytes:
        return self.files.cat_file(f"{self.name}/{key}")

    def remove(self, key: str) -> None:
        self.files.rm_file(f"{self.name}/{key}")

    def keys(self, below: str = "") -> list[str]:
        return sorted(name.partition("/")[2] for name in self.files.find(f"{self.name}/{below}"))

    def check_credentials_after(self, n_requests: int) -> None:
        """The server accepts any credentials in this many requests, and then only known ones."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.server.port}/moto-api/reset-auth",
            data=str(n_requests).encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request).close()

    def key_that_may_only_list(self) -> dict[str, str]:
        """The credentials of a user who may list buckets, but neither read nor write objects."""
        import boto3

        policy = {"Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": "*"}
        iam, name = boto3.client("iam"), f"user-{uuid4().hex[:8]}"
        iam.create_user(UserName=name)
        document = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
        iam.put_user_policy(UserName=name, PolicyName="list", PolicyDocument=document)
        return iam.create_access_key(UserName=name)["AccessKey"]

    def uploads(self) -> list[Any]:
        """The uploads in parts that have not been finished."""
        return self.files.call_s3("list_multipart_uploads", Bucket=self.name).get("Uploads") or []


class Server:
    """A server on a port of its own. It may stop and start again; what is in its buckets stays."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        from moto.moto_server.werkzeug_app import (
            DomainDispatcherApplication,
            MotoRequestHandler,
            create_backend_app,
        )
        from werkzeug.serving import make_server

        application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", self.port, application, threaded=True, request_handler=MotoRequestHandler
        )
        self.port = self._server.port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def s3_server() -> Iterator[Any]:
    """A server and a file system of it; the environment names it to this process and to those it starts."""
    import fsspec

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server()
    variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "no_proxy": "127.0.0.1"}
    with mock.patch.dict(os.environ, CREDENTIALS | variables):
        store.cache_clear()
        try:
            yield server, fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        finally:
            store.cache_clear()
            server.stop()
