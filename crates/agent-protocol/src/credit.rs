//! How much of a stream may be under way: one count on each side.

use crate::WINDOW_BYTES;

/// What the sender of a stream may still send.
#[derive(Debug)]
pub struct Credit(u32);

impl Default for Credit {
    fn default() -> Self {
        Self(WINDOW_BYTES)
    }
}

impl Credit {
    /// How many bytes may go.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0 as usize
    }

    /// Counts bytes that go.
    ///
    /// # Panics
    ///
    /// If there is no credit for them: the sender asks before.
    pub fn spend(&mut self, bytes: usize) {
        let left = self.bytes().checked_sub(bytes);
        #[expect(clippy::cast_possible_truncation, reason = "it was a u32")]
        let left = left.expect("the sender asks before it sends") as u32;
        self.0 = left;
    }

    /// Takes what the receiver gives back.
    ///
    /// # Errors
    ///
    /// The receiver gives more than it was sent.
    pub fn add(&mut self, bytes: u32) -> Result<(), OverWindow> {
        let sum = self.0.saturating_add(bytes);
        if sum > WINDOW_BYTES {
            return Err(OverWindow);
        }
        self.0 = sum;
        Ok(())
    }
}

/// What the receiver of a stream still has to take, and what it has not given back yet.
#[derive(Debug)]
pub struct Window {
    open: u32,
    passed_on: u32,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            open: WINDOW_BYTES,
            passed_on: 0,
        }
    }
}

/// One side sent, or gave, more than a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than the window of {WINDOW_BYTES} bytes of a stream")]
pub struct OverWindow;

impl Window {
    /// Gives back at least so much at once, so that a stream of small pieces is not answered by as many frames.
    const WORTH_SAYING: u32 = WINDOW_BYTES / 4;

    /// Counts bytes that came.
    ///
    /// # Errors
    ///
    /// The sender had no credit for them.
    pub fn came(&mut self, bytes: usize) -> Result<(), OverWindow> {
        let bytes = u32::try_from(bytes).map_err(|_| OverWindow)?;
        self.open = self.open.checked_sub(bytes).ok_or(OverWindow)?;
        Ok(())
    }

    /// Counts bytes that were passed on or thrown away, and says how many are to be given back now, if it is worth a frame.
    pub fn passed(&mut self, bytes: usize) -> Option<u32> {
        let most = WINDOW_BYTES - self.open;
        self.passed_on = u32::try_from(bytes)
            .unwrap_or(u32::MAX)
            .saturating_add(self.passed_on)
            .min(most);
        if self.passed_on < Self::WORTH_SAYING {
            return None;
        }
        self.open += self.passed_on;
        Some(std::mem::take(&mut self.passed_on))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_sender_that_asks_is_never_over_the_window_nor_stuck(pieces in proptest::collection::vec(1..100_000_usize, 1..200)) {
            let mut credit = Credit::default();
            let mut window = Window::default();
            for piece in pieces {
                let mut left = piece;
                while left > 0 {
                    let now = left.min(credit.bytes());
                    prop_assert!(now > 0, "stuck");
                    credit.spend(now);
                    window.came(now).unwrap();
                    left -= now;
                    if let Some(given) = window.passed(now) {
                        credit.add(given).unwrap();
                    }
                }
            }
        }
    }

    #[test]
    fn neither_side_can_go_over() {
        let mut window = Window::default();
        window.came(WINDOW_BYTES as usize).unwrap();
        assert_eq!(window.came(1), Err(OverWindow));
        assert_eq!(window.came(usize::MAX), Err(OverWindow));
        let mut credit = Credit::default();
        assert_eq!(credit.add(1), Err(OverWindow));
        credit.spend(10);
        assert_eq!(credit.add(u32::MAX), Err(OverWindow));
        credit.add(10).unwrap();
    }
}
