"""launch/serve.py: from its arguments to a running service."""

from __future__ import annotations

from argparse import Namespace

from vidcls.serve.limits import ServeLimits


def serve(arguments: Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are answered first.

    Raises:
        ValueError: the options, the model, or packages that are missing.
    """
    try:
        import uvicorn

        from vidcls.serve.app import create_app
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'vidcls[serve]'") from None
    from vidcls.predict.predictor import Predictor

    limits = ServeLimits(
        upload_bytes=round(arguments.max_mb * 2**20),
        video_seconds=arguments.max_seconds,
        decode_seconds=arguments.decode_seconds,
        waiting=arguments.max_waiting,
        workers=arguments.workers,
        batch_size=arguments.batch_size,
        batch_wait=arguments.batch_wait,
    )
    predictor = Predictor.load(
        arguments.checkpoint,
        head=arguments.head,
        base=arguments.model,
        trust_remote_code=arguments.trust_remote_code,
    )
    app = create_app(predictor, limits)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning", timeout_graceful_shutdown=30)
