//! A command on its way to the owner of the machine, and its answer on the way back.

use std::fmt;

use crate::{Answer, Command, Refusal};

/// Where answers go.
type Deliver = Box<dyn FnOnce(Result<Answer, Refusal>) + Send>;

/// A command, and where its answer goes.
#[derive(Debug)]
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// Where the answer goes.
    pub reply: Reply,
}

/// Takes one answer. Whoever asked always gets one: a reply that is dropped says that the machine has ended.
pub struct Reply(Option<Deliver>);

impl Reply {
    /// A reply that is handed to `deliver`, which must not block and is called once.
    #[must_use]
    pub fn new(deliver: impl FnOnce(Result<Answer, Refusal>) + Send + 'static) -> Self {
        Self(Some(Box::new(deliver)))
    }

    /// Answers.
    pub fn send(mut self, outcome: Result<Answer, Refusal>) {
        if let Some(deliver) = self.0.take() {
            deliver(outcome);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(deliver) = self.0.take() {
            let text = "the machine has ended before it could answer";
            deliver(Err(Refusal::Failed(text.into())));
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn there_is_always_one_answer() {
        let (to, from) = mpsc::channel();
        let reply = |to: &mpsc::Sender<_>| {
            let to = to.clone();
            Reply::new(move |outcome| to.send(outcome).unwrap())
        };
        reply(&to).send(Ok(Answer::Done));
        drop(reply(&to));
        drop(to);
        let answers: Vec<_> = from.iter().collect();
        assert_eq!(answers.len(), 2);
        assert_eq!(answers[0], Ok(Answer::Done));
        assert!(matches!(&answers[1], Err(Refusal::Failed(why)) if why.contains("ended")));
    }
}
