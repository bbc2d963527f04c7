//! The life of a vCPU thread, as a pure table.
//!
//! ```text
//! Created ──Entered──▶ Paused ────Run────▶ Running
//!                        ▲                    │
//!                        └── Pause, Yielded ──┘
//!            Stop, from Paused or Running ──▶ Stopped
//! ```
//!
//! Save is answered in Paused, which it does not leave, and refused in Running.

/// Where a vCPU thread is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The thread exists and has not entered its sandbox yet.
    Created,
    /// Waits for orders; guest code does not run.
    Paused,
    /// Runs guest code.
    Running,
    /// Over.
    Stopped,
}

/// What happens to a vCPU thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// The sandbox was entered.
    Entered,
    /// The machine orders it to run.
    Run,
    /// The machine orders it to pause.
    Pause,
    /// The machine wants the processor's state.
    Save,
    /// The machine orders it to stop for good.
    Stop,
    /// The guest did something after which this processor must not go on by itself.
    Yielded,
}

/// What the thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Wait for the next order.
    Wait,
    /// Say that the processor is paused, then wait.
    TellPaused,
    /// Tell the processor's state, then wait.
    TellState,
    /// Say that the state of a running processor cannot be told, then run guest code.
    RefuseState,
    /// Run guest code.
    RunGuest,
    /// End the thread.
    Leave,
}

/// The table.
#[must_use]
pub fn next(state: State, input: Input) -> (State, Effect) {
    match (state, input) {
        (State::Stopped, _) | (State::Paused | State::Running | State::Created, Input::Stop) => {
            (State::Stopped, Effect::Leave)
        }
        // Orders sent before the sandbox is entered wait in the channel and cannot be seen here.
        (
            State::Created,
            Input::Entered | Input::Run | Input::Pause | Input::Save | Input::Yielded,
        )
        | (State::Paused, Input::Entered | Input::Yielded)
        | (State::Running, Input::Yielded) => (State::Paused, Effect::Wait),
        (State::Paused | State::Running, Input::Pause) => (State::Paused, Effect::TellPaused),
        (State::Paused, Input::Save) => (State::Paused, Effect::TellState),
        (State::Running, Input::Save) => (State::Running, Effect::RefuseState),
        (State::Paused | State::Running, Input::Run) | (State::Running, Input::Entered) => {
            (State::Running, Effect::RunGuest)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Effect::{Leave, RefuseState, RunGuest, TellPaused, TellState, Wait};
    use Input::{Entered, Pause, Run, Save, Stop, Yielded};
    use State::{Created, Paused, Running, Stopped};

    #[test]
    fn the_whole_table() {
        let table = [
            (Created, Entered, Paused, Wait),
            (Created, Run, Paused, Wait),
            (Created, Pause, Paused, Wait),
            (Created, Save, Paused, Wait),
            (Created, Stop, Stopped, Leave),
            (Created, Yielded, Paused, Wait),
            (Paused, Entered, Paused, Wait),
            (Paused, Run, Running, RunGuest),
            (Paused, Pause, Paused, TellPaused),
            (Paused, Save, Paused, TellState),
            (Paused, Stop, Stopped, Leave),
            (Paused, Yielded, Paused, Wait),
            (Running, Entered, Running, RunGuest),
            (Running, Run, Running, RunGuest),
            (Running, Pause, Paused, TellPaused),
            (Running, Save, Running, RefuseState),
            (Running, Stop, Stopped, Leave),
            (Running, Yielded, Paused, Wait),
            (Stopped, Entered, Stopped, Leave),
            (Stopped, Run, Stopped, Leave),
            (Stopped, Pause, Stopped, Leave),
            (Stopped, Save, Stopped, Leave),
            (Stopped, Stop, Stopped, Leave),
            (Stopped, Yielded, Stopped, Leave),
        ];
        for (from, input, to, effect) in table {
            assert_eq!(next(from, input), (to, effect), "{from:?} + {input:?}");
        }
    }
}
