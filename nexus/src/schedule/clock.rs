//! A clock that is watched step by step, to check the arithmetic against.
//!
//! Nothing of the arithmetic is used here: the fields are read by a parser of their own, written from
//! the documentation, and time passes as `jiff` shows it, one minute (or second) after the other. What
//! is due is decided at each step, from what the clock shows now and what it has shown before.

use jiff::{
    SignedDuration, Timestamp,
    civil::{Date, date},
    tz::TimeZone,
};

use super::Schedule;

const DAY: usize = 86_400;

const PATTERNS: [&str; 43] = [
    "* * * * *",
    "*/5 * * * *",
    "7-59/13 * * * *",
    "0 * * * *",
    "59 * * * *",
    "*/30 2 * * *",
    "0 */2 * * *",
    "30 1-23/2 * * *",
    "0 0-23 * * *",
    "0 0 * * *",
    "59 23 * * *",
    "30 0 * * *",
    "0 1 * * *",
    "30 1 * * *",
    "0 2 * * *",
    "15 2 * * *",
    "30 2 * * *",
    "0 3 * * *",
    "0,20,40 2 * * *",
    "0 2,3 * * *",
    "15 1-3 * * *",
    "0 9 * * 1-5",
    "0 9 * * MON-FRI",
    "30 2 * * sun",
    "0 22 * * sat-sun",
    "0 0 1 * *",
    "0 0 L * *",
    "0 0 LW * *",
    "0 0 15W * *",
    "0 0 1W,31W * *",
    "0 0 * * FRI#2",
    "0 0 * * 5L",
    "0 0 * * 0#1,7#5",
    "0 0 13 * FRI",
    "30 2 */10 MAR,OCT 7",
    "0 0 29 2 *",
    "0 0 1 1,7 *",
    "@hourly",
    "@daily",
    "@weekly",
    "@monthly",
    "@yearly",
    "@annually",
];

const SIX_FIELDS: [&str; 10] = [
    "* * * * * *",
    "*/10 * * * * *",
    "30 * * * * *",
    "0 0 * * * *",
    "15 30 2 * * *",
    "0,30 59 1,2,23 * * *",
    "* 30 2 * * *",
    "59 59 23 * * *",
    "0 0 0 * * *",
    "7 */20 0-3 * * SUN,MON",
];

/// A clock, watched for a stretch of real time.
#[derive(Clone)]
struct Watched {
    zone: &'static str,
    from: Timestamp,
    to: Timestamp,
    /// Seconds between two looks.
    step: usize,
    /// A day before the first that the clock shows.
    first_day: Date,
    /// What the clock showed at each look: local time in steps since then.
    shown: Vec<usize>,
    /// The largest of these.
    last: usize,
}

impl Watched {
    fn new(zone: &'static str, from: Timestamp, to: Timestamp, step: usize) -> Self {
        let time_zone = TimeZone::get(zone).unwrap();
        let first_day = time_zone.to_datetime(from).date() - SignedDuration::from_hours(48);
        let since = midnight(first_day).as_second();
        let shown: Vec<usize> = (from.as_second()..to.as_second())
            .step_by(step)
            .map(|second| {
                let at = Timestamp::from_second(second).unwrap();
                let offset = i64::from(time_zone.to_offset(at).seconds());
                usize::try_from(second + offset - since).unwrap() / step
            })
            .collect();
        Self {
            zone,
            from,
            to,
            step,
            first_day,
            last: shown.iter().copied().max().unwrap(),
            shown,
        }
    }

    fn year(zone: &'static str, year: i16) -> Self {
        let [from, to] = [year, year + 1].map(|year| midnight(date(year, 1, 1)));
        Self::new(zone, from, to, 60)
    }

    /// The hours before and after each change of the clock in that year, and around the end of February.
    fn changes(zone: &'static str, year: i16, hours: i64, step: usize) -> Vec<Self> {
        let year_ends = midnight(date(year + 1, 1, 1));
        let time_zone = TimeZone::get(zone).unwrap();
        let changes = time_zone
            .following(midnight(date(year, 1, 1)))
            .map(|change| change.timestamp())
            .take_while(|&change| change < year_ends);
        let around = SignedDuration::from_hours(hours);
        changes
            .chain([midnight(date(year, 3, 1))])
            .map(|at| Self::new(zone, at - around, at + around, step))
            .collect()
    }

    /// What comes due while the clock is watched.
    fn due(&self, fields: &Fields) -> Vec<Timestamp> {
        let times = fields.times(self.step);
        let mut named = Vec::with_capacity(self.last + times.len());
        let mut day = self.first_day;
        while named.len() <= self.last {
            if fields.has_day(day) {
                named.extend(&times);
            } else {
                named.resize(named.len() + times.len(), false);
            }
            day = day.tomorrow().unwrap();
        }
        let mut due = Vec::new();
        let mut new = self.shown[0];
        for (look, &shown) in self.shown.iter().enumerate() {
            let is_due = if shown == new || fields.by_the_clock {
                named[shown]
            } else {
                // What was skipped since the last look counts now, what was shown before no more.
                shown > new && named[new..=shown].contains(&true)
            };
            if shown >= new {
                new = shown + 1;
            }
            if is_due {
                let seconds = i64::try_from(look * self.step).unwrap();
                due.push(self.from + SignedDuration::from_secs(seconds));
            }
        }
        due
    }

    /// Compares the arithmetic with the clock: forwards, backwards, and from times in between.
    fn compare(&self, expression: &str, due: &[Timestamp]) {
        let schedule = Schedule::parse(expression, Some(self.zone)).unwrap();
        let context = format!("`{expression}` in {} from {}", self.zone, self.from);
        let second = SignedDuration::from_secs(1);
        let mut after = self.from - second;
        for (nth, &expected) in due.iter().enumerate() {
            let next = schedule.next_after(after).unwrap();
            assert_eq!(next, expected, "{context}: next after {after}");
            assert!(next > after, "{context}");
            // From anywhere in between, also from within a second.
            let sometimes = nth % (1 + due.len() / 500) == 0;
            for between in [
                next - SignedDuration::from_nanos(1),
                next - second,
                after + (next.duration_since(after) / 2),
            ] {
                if sometimes && between >= after {
                    let again = schedule.next_after(between).unwrap();
                    assert_eq!(again, next, "{context}: next after {between}");
                }
            }
            after = next;
        }
        let beyond = schedule.next_after(after);
        assert!(
            beyond.is_err() || beyond.unwrap() >= self.to,
            "{context}: due after {after}, where the clock shows nothing"
        );
        let mut until = self.to - second;
        for &expected in due.iter().rev() {
            let previous = schedule.previous(until).unwrap();
            assert_eq!(previous, expected, "{context}: last until {until}");
            let within = previous + SignedDuration::from_millis(999);
            assert_eq!(schedule.previous(within), Some(previous), "{context}");
            until = previous - second;
        }
        if let Some(previous) = schedule.previous(until) {
            assert!(previous < self.from, "{context}: {previous} before all");
        }
    }
}

/// An expression as the documentation says it is read.
struct Fields {
    seconds: Vec<Item>,
    minutes: Vec<Item>,
    hours: Vec<Item>,
    days: Vec<Item>,
    months: Vec<Item>,
    weekdays: Vec<Item>,
    by_the_clock: bool,
    any_day: bool,
    any_weekday: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Item {
    Range { first: i64, last: i64, step: i64 },
    LastDay,
    LastWorkday,
    Workday(i64),
    Nth { weekday: i64, nth: i64 },
    Last { weekday: i64 },
}

impl Fields {
    fn parse(expression: &str) -> Self {
        let expression = match expression {
            "@yearly" | "@annually" => "0 0 1 1 *",
            "@monthly" => "0 0 1 * *",
            "@weekly" => "0 0 * * 0",
            "@daily" => "0 0 * * *",
            "@hourly" => "0 * * * *",
            written => written,
        };
        let mut fields: Vec<&str> = expression.split_whitespace().collect();
        if fields.len() == 5 {
            fields.insert(0, "0");
        }
        let [seconds, minutes, hours, days, months, weekdays] = fields[..] else {
            panic!("{expression}");
        };
        Self {
            seconds: items(seconds, 0, 59),
            minutes: items(minutes, 0, 59),
            hours: items(hours, 0, 23),
            days: items(days, 1, 31),
            months: items(months, 1, 12),
            weekdays: items(weekdays, 0, 7),
            by_the_clock: [seconds, minutes, hours].concat().contains('*'),
            any_day: days == "*",
            any_weekday: weekdays == "*",
        }
    }

    /// For each step of a day, whether it is named.
    fn times(&self, step: usize) -> Vec<bool> {
        let mut times = vec![false; DAY / step];
        for hour in (0..24).filter(|&hour| has(&self.hours, hour)) {
            for minute in (0..60).filter(|&minute| has(&self.minutes, minute)) {
                for second in (0..60).filter(|&second| has(&self.seconds, second)) {
                    let at = usize::try_from(hour * 3600 + minute * 60 + second).unwrap();
                    if at % step == 0 {
                        times[at / step] = true;
                    }
                }
            }
        }
        times
    }

    fn has_day(&self, date: Date) -> bool {
        let day = i64::from(date.day());
        let length = i64::from(date.days_in_month());
        // Sunday is 0.
        let weekday = i64::from(date.weekday().to_sunday_zero_offset());
        let is_workday =
            |day: i64| !matches!((weekday + day - i64::from(date.day())).rem_euclid(7), 0 | 6);
        let nearest = |wanted: i64| {
            // The nearest working day of the same month: before, after, or two days away at its ends.
            [0, -1, 1, -2, 2]
                .map(|distance| wanted + distance)
                .into_iter()
                .find(|&day| (1..=length).contains(&day) && is_workday(day))
        };
        let by_day = self.days.iter().any(|&item| match item {
            Item::LastDay => day == length,
            Item::LastWorkday => (1..=length).rev().find(|&day| is_workday(day)) == Some(day),
            Item::Workday(wanted) => wanted <= length && nearest(wanted) == Some(day),
            item => has(&[item], day),
        });
        let by_weekday = self.weekdays.iter().any(|&item| match item {
            Item::Nth {
                weekday: wanted,
                nth,
            } => wanted % 7 == weekday && (day + 6) / 7 == nth,
            Item::Last { weekday: wanted } => wanted % 7 == weekday && day + 7 > length,
            item => has(&[item], weekday) || (weekday == 0 && has(&[item], 7)),
        });
        let fits = match (self.any_day, self.any_weekday) {
            (false, false) => by_day || by_weekday,
            _ => by_day && by_weekday,
        };
        fits && has(&self.months, i64::from(date.month()))
    }
}

fn has(items: &[Item], value: i64) -> bool {
    items.iter().any(|&item| match item {
        Item::Range { first, last, step } => {
            (first..=last).contains(&value) && (value - first) % step == 0
        }
        _ => false,
    })
}

fn items(field: &str, min: i64, max: i64) -> Vec<Item> {
    field
        .to_uppercase()
        .split(',')
        .map(|item| match item {
            "L" => Item::LastDay,
            "LW" => Item::LastWorkday,
            _ => {
                if let Some(day) = item.strip_suffix('W') {
                    Item::Workday(value(day))
                } else if let Some((weekday, nth)) = item.split_once('#') {
                    Item::Nth {
                        weekday: value(weekday),
                        nth: value(nth),
                    }
                } else if let (Some(weekday), 7) = (item.strip_suffix('L'), max) {
                    Item::Last {
                        weekday: value(weekday),
                    }
                } else {
                    range(item, min, max)
                }
            }
        })
        .collect()
}

fn range(item: &str, min: i64, max: i64) -> Item {
    let (range, step) = item.split_once('/').unwrap_or((item, "1"));
    let (first, last) = match range.split_once('-') {
        _ if range == "*" => (min, max),
        // A range that ends with Sunday goes on to the end of the week.
        Some((first, "SUN")) => (value(first), 7),
        Some((first, last)) => (value(first), value(last)),
        None => (value(range), value(range)),
    };
    Item::Range {
        first,
        last,
        step: value(step),
    }
}

fn value(text: &str) -> i64 {
    const MONTHS: &str = "JANFEBMARAPRMAYJUNJULAUGSEPOCTNOVDEC";
    const WEEKDAYS: &str = "SUNMONTUEWEDTHUFRISAT";
    if let Ok(number) = text.parse() {
        return number;
    }
    let place = match (MONTHS.find(text), WEEKDAYS.find(text)) {
        (Some(at), _) => at / 3 + 1,
        (None, Some(at)) => at / 3,
        _ => panic!("{text}"),
    };
    place.try_into().unwrap()
}

/// A pattern that is due more often is watched in less time: around the changes.
const MOST: usize = 2_500;

fn check_zone(zone: &'static str, year: i16) {
    let year_in_minutes = vec![Watched::year(zone, year)];
    let days_in_minutes = Watched::changes(zone, year, 50, 60);
    let days_in_seconds = Watched::changes(zone, year, 7, 1);
    let hours_in_seconds = Watched::changes(zone, year, 2, 1);
    for (patterns, wide, narrow) in [
        (&PATTERNS[..], year_in_minutes, days_in_minutes),
        (&SIX_FIELDS[..], days_in_seconds, hours_in_seconds),
    ] {
        for pattern in patterns {
            let fields = Fields::parse(pattern);
            let due = |stretches: &[Watched]| -> Vec<Vec<Timestamp>> {
                stretches
                    .iter()
                    .map(|watched| watched.due(&fields))
                    .collect()
            };
            let all = due(&wide);
            let (stretches, due) = if all.iter().map(Vec::len).sum::<usize>() <= MOST {
                (&wide, all)
            } else {
                (&narrow, due(&narrow))
            };
            for (watched, due) in stretches.iter().zip(due) {
                watched.compare(pattern, &due);
            }
        }
    }
}

fn midnight(date: Date) -> Timestamp {
    let midnight = date.to_datetime(jiff::civil::Time::midnight());
    TimeZone::UTC.to_timestamp(midnight).unwrap()
}

/// A test for each zone, so that they run side by side.
macro_rules! agrees_with_the_clock {
    ($($name:ident: $zone:literal in $year:literal;)*) => {
        $(
            #[test]
            fn $name() {
                check_zone($zone, $year);
            }
        )*
    };
}

agrees_with_the_clock! {
    agrees_with_the_clock_of_utc_in_a_leap_year: "UTC" in 2024;
    agrees_with_the_clock_of_berlin: "Europe/Berlin" in 2026;
    agrees_with_the_clock_of_new_york: "America/New_York" in 2028;
    agrees_with_a_clock_changed_by_half_an_hour: "Australia/Lord_Howe" in 2026;
    agrees_with_a_clock_changed_by_two_hours: "Antarctica/Troll" in 2026;
    agrees_with_a_clock_changed_at_midnight_in_the_south: "America/Sao_Paulo" in 2018;
    agrees_with_a_clock_changed_at_midnight_in_the_north: "Africa/Cairo" in 2024;
    agrees_with_a_clock_changed_at_midnight_on_a_sunday: "Asia/Beirut" in 2022;
    agrees_with_a_clock_that_is_never_changed: "Asia/Kolkata" in 2026;
    agrees_with_a_clock_that_skipped_a_day: "Pacific/Apia" in 2011;
    agrees_with_a_clock_that_is_back_in_summer: "Europe/Dublin" in 2026;
    agrees_with_a_clock_changed_for_ramadan: "Africa/Casablanca" in 2026;
}

/// Random expressions around the changes of random years and zones.
#[test]
fn agrees_with_the_clock_for_random_expressions() {
    const ZONES: [&str; 10] = [
        "Europe/Berlin",
        "America/New_York",
        "Australia/Lord_Howe",
        "Antarctica/Troll",
        "America/Sao_Paulo",
        "Africa/Cairo",
        "Asia/Beirut",
        "Pacific/Apia",
        "America/Nuuk",
        "Pacific/Chatham",
    ];
    let seed = 7;
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut due_at_all = 0;
    for _ in 0..40 {
        let zone = ZONES[random.usize(..ZONES.len())];
        let year = random.i16(2008..2031);
        let stretches = [
            Watched::changes(zone, year, 75, 60),
            Watched::changes(zone, year, 1, 1),
        ]
        .concat();
        for _ in 0..10 {
            let expression = random_expression(&mut random);
            let fields = Fields::parse(&expression);
            for watched in &stretches {
                if (watched.step == 1) == expression.split(' ').nth(5).is_some() {
                    let due = watched.due(&fields);
                    watched.compare(&expression, &due);
                    due_at_all += due.len();
                }
            }
        }
    }
    assert!(due_at_all > 10_000, "{due_at_all}");
}

fn random_expression(random: &mut fastrand::Rng) -> String {
    // Each part either any value, or something about the hours that changes are in.
    let mut field = |min: u8, max: u8, extra: &[&str]| -> String {
        let pick = random.usize(..9 + extra.len());
        let a = random.u8(min..=max);
        let b = random.u8(a..=max);
        let step = random.u8(1..=7);
        match pick {
            0..=2 => "*".to_owned(),
            3 => format!("*/{step}"),
            4 => a.to_string(),
            5 => format!("{a}-{b}"),
            6 => format!("{a}-{b}/{step}"),
            7 => format!("{b},{a}"),
            8 => format!("{a}-{b},{min},*/{}", step + 20),
            extra_at => extra[extra_at - 9].to_owned(),
        }
    };
    let minute = field(0, 59, &["0", "30", "59", "15"]);
    let hour = field(0, 23, &["0", "1", "2", "3", "0-3", "2,3", "22-23", "1-2"]);
    let day = field(
        1,
        31,
        &["L", "LW", "15W", "31W,1W", "*", "*", "*", "*", "*", "*"],
    );
    let month = field(
        1,
        12,
        &["MAR,OCT", "APR", "NOV", "*", "*", "*", "*", "*", "*"],
    );
    let weekday = field(
        0,
        7,
        &[
            "SUN", "FRI#2", "0L", "SAT-SUN", "7#5,6#1", "*", "*", "*", "*",
        ],
    );
    let seconds = match field(0, 59, &["0", "0", "30", "59"]) {
        seconds if seconds.contains('0') => String::new(),
        seconds => seconds + " ",
    };
    format!("{seconds}{minute} {hour} {day} {month} {weekday}")
}
