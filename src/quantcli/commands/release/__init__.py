"""`quantcli release`: one model, several checkpoints, one report.

`planning` checks all of it before anything is written, `running` calibrates, converts and verifies,
`outcome` is what is known afterwards. The file is read by `recipe/release`.
"""
