"""`quantcli sign`: its options and its output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantcli.cli import next as following
from quantcli.cli import options
from quantcli.cli.output import OK, WARNING, Output
from quantcli.core.text import count
from quantcli.core.text import size as size_text

if TYPE_CHECKING:
    from quantcli.commands.trust.sign import Signature


@options.on_screen
def sign(
    output: Output,
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint, whoever wrote it.")],
    key: Annotated[Path, typer.Option(metavar="KEY.pem", help="Private key that signs, in PEM.")],
    certificate: Annotated[
        Path | None, typer.Option(metavar="CERT.pem", help="Certificate of the key.")
    ] = None,
    chain: Annotated[
        Path | None, typer.Option(metavar="CHAIN.pem", help="Certificates above that of the key.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a signature that is there.")] = False,
    workers: options.Workers = None,
) -> None:
    """Sign all files of a checkpoint.

    The signature is the file model.sig in its folder, in the format of OpenSSF Model Signing.
    `quantcli verify CHECKPOINT --identity KEY.pub` checks it, and so does the reference client,
    model_signing. Works without a network.

    The password of an encrypted key is in QUANTCLI_PASSWORD.
    """
    from quantcli.checkpoint.signature.keys import load_signer
    from quantcli.cli.progress import watch
    from quantcli.commands.trust.sign import sign_folder

    signer = load_signer(key, certificate, chain)
    with watch(output) as progress:
        signed = sign_folder(checkpoint, signer, force, workers, progress)
    for note in signed.notes:
        output.message(f"note: {note}", WARNING)
    output.result(signed.to_dict(), lambda out, _: _show(out, signed))
    identity = "CERTIFICATES.pem" if signer.certificates else "KEY.pub"
    following.show(output, [*following.shell("quantcli", "verify", checkpoint, "--identity"), identity])


def _show(out: Output, signed: Signature) -> None:
    what = f"{count(signed.files, 'file')}, {size_text(signed.bytes)}"
    out.line(f"signed       {signed.signature}: {what}, as {signed.signer}", OK)
