//! Reads the metrics file of our own VMM: when it entered the guest, and every exit by its address.
//!
//! Knows one line of JSON, and of its counters only those of processors.

use std::collections::BTreeMap;

use serde_json::Value;

/// What the last line of a metrics file says.
#[derive(Debug, PartialEq)]
pub(crate) struct Metrics {
    pub(crate) first_run_ms: Option<f64>,
    /// Exits of all processors: `port read 0x3fd` and how many.
    pub(crate) exits: BTreeMap<String, f64>,
}

/// Sums over addresses, which are there, too.
const SUMS: [&str; 4] = ["port_read", "port_write", "mmio_read", "mmio_write"];

/// Reads a metrics file.
///
/// # Errors
/// It has no line of JSON.
pub(crate) fn parse(text: &str) -> Result<Metrics, String> {
    let line = text.lines().last().ok_or("the metrics file is empty")?;
    let line: Value = serde_json::from_str(line).map_err(|e| format!("metrics file: {e}"))?;
    let first_run_ms = line["boot"]["first_instruction_us"]
        .as_f64()
        .map(|us| us / 1000.0);
    let mut exits = BTreeMap::new();
    let sets = line.as_object().into_iter().flatten();
    for (_, counters) in sets.filter(|(name, _)| name.starts_with("vcpu ")) {
        for (name, count) in counters.as_object().into_iter().flatten() {
            let (Some(what), Some(count)) = (name.strip_prefix("exits_"), count.as_f64()) else {
                continue;
            };
            if count > 0.0 && !SUMS.contains(&what) {
                *exits.entry(what.replace('_', " ")).or_default() += count;
            }
        }
    }
    Ok(Metrics {
        first_run_ms,
        exits,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_counts() {
        let text = r#"{"boot":{"first_instruction_us":null,"init_us":null}}
{"boot":{"first_instruction_us":2500,"init_us":90000},"serial":{"exits_x":3},
"vcpu 0":{"exits_port_read":7,"exits_port_read_0x3fd":7,"exits_others":0,"runs":9},"vcpu 1":{"exits_port_read_0x3fd":1}}
"#
        .replace(",\n\"vcpu 0", ",\"vcpu 0");
        let metrics = parse(&text).unwrap();
        assert_eq!(metrics.first_run_ms, Some(2.5));
        assert_eq!(
            metrics.exits,
            BTreeMap::from([("port read 0x3fd".to_owned(), 8.0)])
        );
        assert!(parse("").is_err() && parse("{").is_err());
    }
}
