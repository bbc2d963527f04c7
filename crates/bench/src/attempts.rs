//! How the runs of one column went, and whose turn it is.

/// How the runs of one column went.
#[derive(Debug)]
pub(crate) struct Attempts {
    pub(crate) count: u32,
    pub(crate) failures: Vec<String>,
    in_a_row: u32,
    most_in_a_row: u32,
}

impl Attempts {
    /// None yet. After so many failures in a row the column is to be left alone: each may cost a whole time-out.
    pub(crate) fn new(most_in_a_row: u32) -> Self {
        Self {
            count: 0,
            failures: Vec::new(),
            in_a_row: 0,
            most_in_a_row,
        }
    }

    /// Notes how a run went.
    pub(crate) fn note(&mut self, outcome: Result<(), String>) {
        self.count += 1;
        match outcome {
            Ok(()) => self.in_a_row = 0,
            Err(what) => {
                self.in_a_row += 1;
                self.failures.push(what);
            }
        }
    }

    pub(crate) fn given_up(&self) -> bool {
        self.in_a_row >= self.most_in_a_row
    }
}

/// Rounds over all columns, each starting one further along: the round, and the column's number.
pub(crate) fn in_turn(rounds: u32, columns: usize) -> impl Iterator<Item = (u32, usize)> {
    (0..rounds).flat_map(move |round| {
        (0..columns).map(move |place| (round, (round as usize + place) % columns))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_round_starts_one_further_along() {
        let order: Vec<_> = in_turn(2, 3).collect();
        assert_eq!(order, [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 0)]);
        assert_eq!(in_turn(2, 0).count(), 0);
    }
}
