//! Medians, ratios pair by pair, and tables of them.

use std::fmt::Write as _;

use serde::Serialize;

/// The middle and the ends of some figures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one, or the mean of the middle two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// `None` of no figures.
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let median = match sorted.len() % 2 {
            0 => f64::midpoint(*sorted.get(middle - 1)?, upper),
            _ => upper,
        };
        Some(Self {
            median,
            min: *sorted.first()?,
            max: *sorted.last()?,
        })
    }

    /// Of the quotients of figures that were taken right after each other, which a busy machine
    /// has hurt alike.
    pub fn of_ratios(ours: &[f64], theirs: &[f64]) -> Option<Self> {
        let pairs = ours.iter().zip(theirs).filter(|(_, theirs)| **theirs > 0.0);
        Self::of(pairs.map(|(ours, theirs)| ours / theirs))
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { median, min, max } = self;
        let digits = f.precision().unwrap_or(2);
        write!(f, "{median:.digits$} ({min:.digits$}–{max:.digits$})")
    }
}

/// Columns padded to the same width; the first row is the head.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these columns.
    pub fn new(head: impl IntoIterator<Item = String>) -> Self {
        Self {
            rows: vec![head.into_iter().collect()],
        }
    }

    /// Adds a row.
    pub fn push(&mut self, row: impl IntoIterator<Item = String>) {
        self.rows.push(row.into_iter().collect());
    }

    /// Adds a row for a figure that each contender has in each run, in the order of the head:
    /// a spread each, then the first one's ratio to each of the others.
    pub fn push_figures(&mut self, name: &str, digits: usize, figures: &[Vec<f64>]) {
        let text = |spread: Option<Spread>| match spread {
            Some(spread) => format!("{spread:.digits$}"),
            None => "-".to_owned(),
        };
        let mut row = vec![name.to_owned()];
        row.extend(
            figures
                .iter()
                .map(|figures| text(Spread::of(figures.iter().copied()))),
        );
        if let Some((ours, others)) = figures.split_first() {
            row.extend(
                others
                    .iter()
                    .map(|theirs| match Spread::of_ratios(ours, theirs) {
                        Some(ratio) => ratio.to_string(),
                        None => "-".to_owned(),
                    }),
            );
        }
        self.rows.push(row);
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cell = |row: &Vec<String>, column| row.get(column).cloned().unwrap_or_default();
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let lengths = self
                    .rows
                    .iter()
                    .map(|row| cell(row, column).chars().count());
                lengths.max().unwrap_or(0)
            })
            .collect();
        for (number, row) in self.rows.iter().enumerate() {
            let mut line = String::from("|");
            for (column, width) in widths.iter().enumerate() {
                write!(line, " {:width$} |", cell(row, column))?;
            }
            writeln!(f, "{line}")?;
            if number == 0 {
                let rule: Vec<String> = widths.iter().map(|width| "-".repeat(width + 2)).collect();
                writeln!(f, "|{}|", rule.join("|"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(
            Spread::of([3.0, 1.0, 9.0]),
            Some(Spread {
                median: 3.0,
                min: 1.0,
                max: 9.0
            })
        );
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 9.0]).unwrap().median, 3.0);
    }

    #[test]
    fn ratios_are_of_pairs_and_not_of_medians() {
        let ratio = Spread::of_ratios(&[1.0, 10.0, 3.0], &[2.0, 20.0, 3.0]).unwrap();
        assert_eq!(
            ratio,
            Spread {
                median: 0.5,
                min: 0.5,
                max: 1.0
            }
        );
        assert_eq!(Spread::of_ratios(&[1.0], &[0.0]), None);
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(["what", "a", "b", "a/b"].map(str::to_owned));
        table.push_figures("t", 1, &[vec![1.0, 2.0, 3.0], vec![2.0, 4.0, 6.0]]);
        assert_eq!(
            table.to_string(),
            "| what | a             | b             | a/b              |\n\
             |------|---------------|---------------|------------------|\n\
             | t    | 2.0 (1.0–3.0) | 4.0 (2.0–6.0) | 0.50 (0.50–0.50) |\n"
        );
    }
}
