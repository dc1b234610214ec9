"""Heads that draft from the verifier's hidden states: networks, packed drafting, training.

`calibration.heads.train.train_head` trains one, `calibration.heads.job.run_heads` what a job file names, and
`calibration.heads.check.check_depths` compares packed drafts with a step-by-step loop. Needs torch to run.
"""
