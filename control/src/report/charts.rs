//! Charts as SVG without colours of their own: each colour stands for a role, and the page's style sheet says what it looks like.

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

use super::ReportError;

/// Small, so that text stays readable where a chart is as wide as a telephone.
const WIDTH: u32 = 460;
const HEIGHT: u32 = 280;
const FONT: (&str, u32) = ("sans-serif", 17);
/// Room around what is drawn.
const MARGIN: u32 = 8;
const LABELS_BELOW: u32 = 46;
const LABELS_LEFT: u32 = 62;
/// Lengths of a dash, and of what lies between two.
const DASH: (i32, i32) = (6, 5);

/// What a colour stands for. style.css knows each by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Axes and their text.
    Axis,
    /// Lines behind all else.
    Grid,
    /// What was measured.
    Measured,
    /// What was predicted.
    Predicted,
    /// What the guest does.
    Guest,
    /// A limit.
    Limit,
}

impl Role {
    fn colour(self) -> RGBColor {
        RGBColor(
            match self {
                Role::Axis => 1,
                Role::Grid => 2,
                Role::Measured => 3,
                Role::Predicted => 4,
                Role::Guest => 5,
                Role::Limit => 6,
            },
            0,
            0,
        )
    }

    /// The class of its swatch in a legend.
    pub(super) fn class(self) -> &'static str {
        match self {
            Role::Axis => "axis",
            Role::Grid => "grid",
            Role::Measured => "measured",
            Role::Predicted => "predicted",
            Role::Guest => "guest",
            Role::Limit => "limit",
        }
    }
}

/// A line through points.
pub(super) struct Line {
    pub(super) role: Role,
    pub(super) dashed: bool,
    /// Each point is marked.
    pub(super) marks: bool,
    pub(super) points: Vec<(f64, f64)>,
}

/// What the axes are about.
pub(super) struct Axes<'a> {
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    /// There is nothing between whole values of x.
    pub(super) whole: bool,
}

/// Lines over a common x, both axes from 0.
pub(super) fn lines(axes: &Axes<'_>, lines: &[Line]) -> Result<String, ReportError> {
    let most = |value: fn(&(f64, f64)) -> f64| {
        let all = lines.iter().flat_map(|line| &line.points).map(value);
        all.fold(0.0, f64::max).max(1e-9)
    };
    let (x, y) = (0.0..most(|point| point.0) * 1.02, 0.0..most(|point| point.1) * 1.08);
    draw(|area| {
        let mut chart = frame(area, axes, x, y)?;
        for line in lines {
            let style = line.role.colour().stroke_width(2);
            if line.dashed {
                let dashed = DashedLineSeries::new(line.points.iter().copied(), DASH.0, DASH.1, style);
                chart.draw_series(dashed)?;
            } else {
                chart.draw_series(LineSeries::new(line.points.iter().copied(), style))?;
            }
            if line.marks {
                let mark = |point: &(f64, f64)| Circle::new(*point, 3, line.role.colour().filled());
                chart.draw_series(line.points.iter().map(mark))?;
            }
        }
        Ok(())
    })
}

/// Bars side by side for each of a row of things, numbered from 0.
pub(super) fn bars(axes: &Axes<'_>, groups: &[(Role, Vec<f64>)]) -> Result<String, ReportError> {
    let most = groups.iter().flat_map(|(_, values)| values).fold(1e-9, |most: f64, value| most.max(*value));
    let count = groups.iter().map(|(_, values)| values.len()).max().unwrap_or(0).max(1);
    let width = 0.8 / groups.len().max(1) as f64;
    draw(|area| {
        let mut chart = frame(area, axes, -0.5..count as f64 - 0.5, 0.0..most * 1.08)?;
        for (place, (role, values)) in groups.iter().enumerate() {
            let bar = |(index, value): (usize, &f64)| {
                let left = index as f64 - 0.4 + place as f64 * width;
                Rectangle::new([(left, 0.0), (left + width * 0.92, *value)], role.colour().filled())
            };
            chart.draw_series(values.iter().enumerate().map(bar))?;
        }
        Ok(())
    })
}

/// Points of which x is predicted and y measured, on logarithmic axes, and the line on which both are the same.
pub(super) fn scatter(axes: &Axes<'_>, points: &[(f64, f64)]) -> Result<String, ReportError> {
    let both = || points.iter().flat_map(|(x, y)| [*x, *y]).filter(|value| *value > 0.0);
    let (low, high) = (both().fold(f64::MAX, f64::min) / 1.3, both().fold(f64::MIN, f64::max) * 1.3);
    let (low, high) = if low < high { (low, high) } else { (0.1, 10.0) };
    draw(|area| {
        let mut chart = frame(area, axes, (low..high).log_scale(), (low..high).log_scale())?;
        let same = LineSeries::new([(low, low), (high, high)], Role::Limit.colour().stroke_width(1));
        chart.draw_series(same)?;
        let mark = |point: &(f64, f64)| Circle::new(*point, 4, Role::Measured.colour().mix(0.75).filled());
        chart.draw_series(points.iter().filter(|(x, y)| *x > 0.0 && *y > 0.0).map(mark))?;
        Ok(())
    })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Gives `on` an empty drawing and returns what became of it.
fn draw(on: impl FnOnce(&Area<'_>) -> Result<(), DrawError>) -> Result<String, ReportError> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        on(&area).map_err(|error| ReportError::Drawing(error.to_string()))?;
        area.present().map_err(|error| ReportError::Drawing(error.to_string()))?;
    }
    Ok(svg)
}

type DrawError = DrawingAreaErrorKind<std::io::Error>;
type Chart<'a, 'b, X, Y> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<<X as AsRangedCoord>::CoordDescType, <Y as AsRangedCoord>::CoordDescType>,
>;

/// Axes with their grid.
fn frame<'a, 'b, X, Y>(area: &'a Area<'b>, axes: &Axes<'_>, x: X, y: Y) -> Result<Chart<'a, 'b, X, Y>, DrawError>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut chart = ChartBuilder::on(area)
        .margin(MARGIN)
        .x_label_area_size(LABELS_BELOW)
        .y_label_area_size(LABELS_LEFT)
        .build_cartesian_2d(x, y)?;
    let text = || FONT.into_font().color(&Role::Axis.colour());
    chart
        .configure_mesh()
        .axis_style(Role::Axis.colour())
        .bold_line_style(Role::Grid.colour())
        .light_line_style(TRANSPARENT)
        .label_style(text())
        .axis_desc_style(text())
        .x_desc(axes.x)
        .y_desc(axes.y)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|value| if axes.whole && value.fract() != 0.0 { String::new() } else { short(*value) })
        .y_label_formatter(&|value| short(*value))
        .draw()?;
    Ok(chart)
}

/// As few digits as tell it from its neighbours.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 10.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
