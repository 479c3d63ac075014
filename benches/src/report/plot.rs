//! Plots, as SVG.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

/// Width and height in pixels.
const SIZE: (u32, u32) = (780, 320);

/// Of it, the width of the legend.
const LEGEND: u32 = 175;

/// Size of letters.
const FONT: u32 = 15;

/// How many labels a horizontal axis has at most.
const LABELS: usize = 11;

/// The colours of the series, told apart by those who don't see all colours, too.
const COLOURS: [RGBColor; 4] = [
    RGBColor(0, 100, 180),
    RGBColor(213, 94, 0),
    RGBColor(0, 130, 95),
    RGBColor(175, 75, 135),
];

/// A picture of some figures.
#[derive(Clone, Debug, PartialEq)]
pub struct Plot {
    /// What it shows.
    pub title: String,
    /// What the horizontal axis counts, with its unit.
    pub x: String,
    /// Whether the horizontal axis counts whole things from 1 on.
    pub whole_x: bool,
    /// What the vertical axis counts, with its unit.
    pub y: String,
    /// Whether the vertical axis is logarithmic, and then where it begins at the latest: what is
    /// less is drawn there.
    pub log_from: Option<f64>,
    /// What is drawn.
    pub series: Vec<Series>,
}

/// What has one colour.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// For the legend.
    pub name: String,
    /// How it is drawn.
    pub style: Style,
    /// Each a row of points (x, y).
    pub lines: Vec<Vec<(f64, f64)>>,
}

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Points, and lines from each to the next.
    Line,
    /// Points, and each goes on until the next.
    Steps,
    /// Points only.
    Points,
    /// A thin grey line to compare with.
    Guide,
}

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
#[error("drawing '{title}': {reason}")]
pub struct PlotError {
    title: String,
    reason: String,
}

impl Plot {
    /// Whether there is anything to see.
    pub(super) fn is_empty(&self) -> bool {
        let mut seen = self.series.iter().filter(|s| s.style != Style::Guide);
        !seen.any(|series| series.lines.iter().any(|line| !line.is_empty()))
    }

    /// As an `svg` element, with all text escaped.
    pub(super) fn svg(&self) -> Result<String, PlotError> {
        let mut svg = String::new();
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = match self.log_from {
            None => self.draw(&area, self.range(0.0, |(_, y)| y)),
            Some(from) => {
                let range = self.range(from, |(_, y)| y.max(from));
                self.draw(&area, (range.start..range.end * 1.5).log_scale())
            }
        };
        drawn.map_err(|error| PlotError {
            title: self.title.clone(),
            reason: error.to_string(),
        })?;
        drop(area);
        Ok(svg)
    }

    /// From the least, at most `from`, to the greatest with some room above.
    fn range(&self, from: f64, of: impl Fn((f64, f64)) -> f64) -> Range<f64> {
        let points = self.series.iter().flat_map(|series| &series.lines);
        let values = points.flatten().map(|point| of(*point));
        let (least, greatest) = values.fold((from, from), |(least, greatest), value| {
            (least.min(value), greatest.max(value))
        });
        match greatest > least {
            true => least..greatest + (greatest - least) * 0.05,
            false => least..least + 1.0,
        }
    }

    fn draw<Y>(
        &self,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
        y: Y,
    ) -> Result<(), Box<dyn std::error::Error>>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        area.fill(&WHITE)?;
        // Beside the picture, where it hides nothing.
        let (area, legend) = area.split_horizontally(SIZE.0 - LEGEND);
        let x = self.range(0.0, |(x, _)| x);
        let (x, labels) = match self.whole_x {
            true => (0.5..(x.end.floor() + 0.5), x.end as usize),
            false => (x, LABELS),
        };
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .caption(&self.title, ("sans-serif", 19))
            .x_label_area_size(42)
            .y_label_area_size(62)
            .build_cartesian_2d(x, y)
            .map_err(|error| error.to_string())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .label_style(("sans-serif", FONT))
            .axis_desc_style(("sans-serif", FONT))
            .x_labels(labels.clamp(1, LABELS))
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_label_formatter(&|value| short(*value))
            .y_label_formatter(&|value| short(*value))
            .draw()?;
        let bottom = self.log_from.unwrap_or(f64::MIN);
        for (number, series) in self.series.iter().enumerate() {
            let colour = series.colour(number);
            for line in &series.lines {
                let points: Vec<(f64, f64)> =
                    line.iter().map(|&(x, y)| (x, y.max(bottom))).collect();
                if series.style != Style::Points {
                    let corners = series.corners(&points);
                    chart.draw_series(LineSeries::new(corners, colour.stroke_width(1)))?;
                }
                if series.style != Style::Guide {
                    chart.draw_series(points.iter().map(|at| marker(number, *at, colour)))?;
                }
            }
            let y = 48 + 22 * i32::try_from(number)?;
            match series.style {
                Style::Guide => legend.draw(&PathElement::new(
                    vec![(2, y), (16, y)],
                    colour.stroke_width(1),
                ))?,
                _ => legend.draw(&marker(number, (9, y), colour))?,
            }
            let text = ("sans-serif", FONT).into_text_style(&legend);
            legend.draw(&Text::new(series.name.as_str(), (22, y - 7), text))?;
        }
        area.present()?;
        Ok(())
    }
}

impl Series {
    fn colour(&self, number: usize) -> RGBColor {
        match (self.style, COLOURS.get(number % COLOURS.len())) {
            (Style::Guide, _) | (_, None) => RGBColor(110, 110, 110),
            (_, Some(colour)) => *colour,
        }
    }

    /// Where its line goes along.
    fn corners(&self, points: &[(f64, f64)]) -> Vec<(f64, f64)> {
        if self.style != Style::Steps {
            return points.to_vec();
        }
        let steps = points.windows(2).flat_map(|pair| match pair {
            [(x, y), (next, _)] => vec![(*x, *y), (*next, *y)],
            _ => vec![],
        });
        steps.chain(points.last().copied()).collect()
    }
}

/// A point of that series: colours are not all that tells them apart.
fn marker<B: DrawingBackend, At: Clone + 'static>(
    series: usize,
    at: At,
    colour: RGBColor,
) -> DynElement<'static, B, At> {
    match series % 4 {
        0 => Circle::new(at, 3, colour.filled()).into_dyn(),
        1 => TriangleMarker::new(at, 5, colour.filled()).into_dyn(),
        2 => Cross::new(at, 3, colour.stroke_width(2)).into_dyn(),
        _ => Circle::new(at, 4, colour.stroke_width(2)).into_dyn(),
    }
}

/// A number on an axis, as short as it can be told.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 10.0 || size == 0.0 => 0,
        size if size >= 1.0 => 1,
        size if size >= 0.1 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(log_from: Option<f64>, points: &[(f64, f64)]) -> Plot {
        Plot {
            title: "left <to> send".to_owned(),
            x: "ms".to_owned(),
            whole_x: false,
            y: "MiB".to_owned(),
            log_from,
            series: vec![Series {
                name: "a & b".to_owned(),
                style: Style::Line,
                lines: vec![points.to_vec()],
            }],
        }
    }

    #[test]
    fn all_points_are_drawn_and_all_text_is_escaped() {
        for log_from in [None, Some(0.01)] {
            // Zero has no logarithm: it is drawn at the bottom.
            let svg = plot(log_from, &[(0.0, 512.0), (20.0, 3.0), (25.0, 0.0)])
                .svg()
                .unwrap();
            assert!(svg.starts_with("<svg "), "{svg}");
            // One of them is the legend's.
            assert_eq!(svg.matches("<circle").count(), 4);
            assert!(svg.contains("left &lt;to&gt; send") && svg.contains("a &amp; b"));
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn one_point_and_none_make_a_picture_as_well() {
        assert!(plot(None, &[(0.0, 0.0)]).svg().is_ok());
        assert!(plot(Some(1.0), &[]).svg().is_ok());
        assert!(plot(None, &[]).is_empty());
        assert!(!plot(None, &[(1.0, 1.0)]).is_empty());
    }

    #[test]
    fn a_step_lasts_until_the_next() {
        let series = Series {
            name: String::new(),
            style: Style::Steps,
            lines: vec![],
        };
        assert_eq!(
            series.corners(&[(0.0, 9.0), (2.0, 4.0), (3.0, 0.0)]),
            [(0.0, 9.0), (2.0, 9.0), (2.0, 4.0), (3.0, 4.0), (3.0, 0.0)]
        );
        assert_eq!(series.corners(&[]), []);
    }

    #[test]
    fn whole_things_have_whole_labels() {
        let mut plot = plot(None, &[(1.0, 5.0), (2.0, 6.0), (3.0, 4.0)]);
        plot.whole_x = true;
        let svg = plot.svg().unwrap();
        assert!(!svg.contains("\n1.5\n") && svg.contains("\n3\n"), "{svg}");
    }

    #[test]
    fn numbers_on_axes_are_short() {
        assert_eq!(
            [0.0, 1000.0, 1.5, 2.0, 0.25, 0.004].map(short),
            ["0", "1000", "1.5", "2", "0.25", "0.004"]
        );
    }
}
