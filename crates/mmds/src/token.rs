//! Tokens of sessions: random, good for a time, and known here only.
//!
//! They are kept rather than signed: a bounded table needs no cryptography, and nothing of it survives in a clone.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::MAX_TOKENS;

/// Shortest and longest life of a token, in seconds.
pub(crate) const TTL_SECONDS: std::ops::RangeInclusive<u32> = 1..=21_600;
const BYTES: usize = 32;

#[derive(Debug, Default)]
pub(crate) struct Tokens {
    ends: HashMap<[u8; BYTES], Instant>,
}

impl Tokens {
    /// A new token, good for so long from `now`.
    ///
    /// # Errors
    /// The host has no random bytes.
    pub(crate) fn create(
        &mut self,
        ttl: Duration,
        now: Instant,
    ) -> Result<String, getrandom::Error> {
        let mut token = [0; BYTES];
        getrandom::fill(&mut token)?;
        if self.ends.len() >= MAX_TOKENS {
            self.ends.retain(|_, end| *end > now);
        }
        if self.ends.len() >= MAX_TOKENS
            && let Some(first) = self
                .ends
                .iter()
                .min_by_key(|(_, end)| **end)
                .map(|(t, _)| *t)
        {
            self.ends.remove(&first);
        }
        self.ends.insert(token, now.checked_add(ttl).unwrap_or(now));
        Ok(token.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    pub(crate) fn is_good(&self, text: &str, now: Instant) -> bool {
        let digits = text.as_bytes();
        let mut token = [0; BYTES];
        let is_token = digits.len() == BYTES.saturating_mul(2)
            && token.iter_mut().zip(digits.chunks(2)).all(|(byte, pair)| {
                let read = std::str::from_utf8(pair)
                    .ok()
                    .filter(|pair| pair.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
                    .and_then(|pair| u8::from_str_radix(pair, 16).ok());
                read.map(|read| *byte = read).is_some()
            });
        is_token && self.ends.get(&token).is_some_and(|end| *end > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_good_for_their_time_and_unlike_each_other() {
        let mut tokens = Tokens::default();
        let now = Instant::now();
        let one = tokens.create(Duration::from_secs(10), now).unwrap();
        let other = tokens.create(Duration::from_secs(20), now).unwrap();
        assert_ne!(one, other);
        let after = |seconds| now + Duration::from_secs(seconds);
        assert!(tokens.is_good(&one, after(9)) && tokens.is_good(&other, after(9)));
        assert!(!tokens.is_good(&one, after(10)) && tokens.is_good(&other, after(10)));
        for wrong in [
            "",
            "x",
            &one[1..],
            &format!("{one}0"),
            &one.to_uppercase(),
            &"é".repeat(32),
        ] {
            assert!(!tokens.is_good(wrong, now), "{wrong}");
        }
    }

    #[test]
    fn tokens_are_bounded_and_the_first_to_end_goes() {
        let mut tokens = Tokens::default();
        let now = Instant::now();
        let short = tokens.create(Duration::from_secs(1), now).unwrap();
        let long = tokens.create(Duration::from_secs(1000), now).unwrap();
        for _ in 0..MAX_TOKENS + 10 {
            tokens.create(Duration::from_secs(100), now).unwrap();
        }
        assert_eq!(tokens.ends.len(), MAX_TOKENS);
        assert!(!tokens.is_good(&short, now) && tokens.is_good(&long, now));
    }
}
