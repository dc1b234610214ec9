"""Real engines, driven and measured.

    protocol         what an engine must do; `own` (torch) and `openvino` (OpenVINO GenAI) do it
    drive            one repeat of a workload, on a clock that skips idle time
    record           conditions of several repeats as measured runs, in turns and resumable
    once             the workload of a run that is there for its text
    openvino_plan    what an OpenVINO GenAI pipeline computes in its next step

Nothing is imported here: each engine needs packages of its own.
"""
