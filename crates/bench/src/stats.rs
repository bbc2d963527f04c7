//! Medians and how figures are written. Does not know what was measured.

/// The median and the range of some samples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// The median (the mean of the middle two of an even number) and the range; nothing of nothing.
pub(crate) fn summarize(samples: &[f64]) -> Option<Summary> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    };
    Some(Summary { median, min, max })
}

/// A figure with as many decimals as help: whole numbers without, small ones with two.
pub(crate) fn figure(value: f64) -> String {
    if (value - value.round()).abs() < 1e-9 || value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// A table cell: median, the range if there is one, the ratio to `reference` if given.
pub(crate) fn cell(summary: Summary, reference: Option<f64>) -> String {
    let mut text = figure(summary.median);
    let (min, max) = (figure(summary.min), figure(summary.max));
    if min != max {
        text += &format!(" [{min}-{max}]");
    }
    if let Some(reference) = reference.filter(|&r| r > 0.0) {
        text += &format!(" ({:.2}x)", summary.median / reference);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(summarize(&[]), None);
        let of = |samples: &[f64]| summarize(samples).unwrap().median;
        assert_eq!(of(&[3.0]), 3.0);
        assert_eq!(of(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(of(&[4.0, 1.0, 3.0, 100.0]), 3.5);
        let s = summarize(&[2.0, 1.0, 5.0]).unwrap();
        assert_eq!((s.min, s.max), (1.0, 5.0));
    }

    #[test]
    fn cells() {
        let s = |median, min, max| Summary { median, min, max };
        assert_eq!(cell(s(2.0, 2.0, 2.0), None), "2");
        assert_eq!(
            cell(s(129.4, 120.0, 143.2), Some(258.8)),
            "129 [120-143] (0.50x)"
        );
        assert_eq!(cell(s(0.294, 0.294, 0.294), Some(0.294)), "0.29 (1.00x)");
        assert_eq!(cell(s(20.84, 18.2, 23.8), Some(0.0)), "20.8 [18.2-23.8]");
    }
}
