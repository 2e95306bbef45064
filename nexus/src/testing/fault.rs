use std::{panic::Location, sync::Arc, sync::Mutex};

use tokio::sync::watch;

use super::{TestApp, settled::PATIENCE};
use crate::runtime::points::{Deed, Place, Point, Points, Trap};

/// A fault that is armed on one node, and springs when a [`Place`] is reached.
///
/// It springs once, at the first handler that gets there, unless it is told otherwise before it is
/// [armed](TestApp::arm).
#[derive(Debug)]
#[must_use = "a fault does nothing until it is armed"]
pub struct Fault {
    place: Place,
    deed: Deed,
    handler: Option<String>,
    times: u32,
}

impl Fault {
    /// At a checkpoint: the handler fails with an error that is tried again. At a [`Point`]: the
    /// connection to the database is lost there, so that at an *after* the node does not learn that its
    /// verdict was stored.
    pub fn fail(place: impl Into<Place>) -> Self {
        Self::new(place.into(), Deed::Fail)
    }

    /// At a checkpoint: the handler panics. At a [`Point`]: the loop of the runtime does that is there,
    /// and is started again.
    pub fn panic(place: impl Into<Place>) -> Self {
        Self::new(place.into(), Deed::Panic)
    }

    /// The node dies: see [`TestApp::crash`].
    pub fn crash(place: impl Into<Place>) -> Self {
        Self::new(place.into(), Deed::Crash)
    }

    fn new(place: Place, deed: Deed) -> Self {
        Self {
            place,
            deed,
            handler: None,
            times: 1,
        }
    }

    /// Only when this handler gets there; for ticks, the scheduled task.
    pub fn of(self, handler: impl Into<String>) -> Self {
        Self {
            handler: Some(handler.into()),
            ..self
        }
    }

    /// How often it springs; default once.
    pub fn times(self, times: u32) -> Self {
        Self { times, ..self }
    }
}

/// A fault on a node.
#[derive(Debug)]
pub struct Armed {
    trap: Arc<Trap>,
    points: Arc<Points>,
    at: &'static Location<'static>,
}

impl Armed {
    /// How often it has sprung.
    #[must_use]
    pub fn hits(&self) -> u32 {
        *self.trap.hits.borrow()
    }

    /// Waits until it has sprung at least once.
    ///
    /// # Panics
    ///
    /// If that takes longer than two minutes. The text names the checkpoints that were reached.
    #[track_caller]
    pub fn reached(&self) -> impl Future<Output = ()> {
        let at = Location::caller();
        async move {
            let mut hits = self.trap.hits.subscribe();
            let sprung = hits.wait_for(|hits| *hits > 0);
            if tokio::time::timeout(PATIENCE, sprung).await.is_err() {
                let what = match &self.trap.place {
                    Place::Runtime(point) => format!("`Point::{point:?}`"),
                    Place::Checkpoint(name) => format!("checkpoint `{name}`"),
                };
                let passed = self.points.checkpoints();
                let passed: Vec<&str> = passed.iter().map(String::as_str).collect();
                panic!(
                    "{at}: nobody has reached {what} within {PATIENCE:?} (armed at {}); checkpoints that were reached: {}",
                    self.at,
                    super::settled::list(&passed)
                );
            }
        }
    }
}

impl TestApp {
    /// Lets a place fail, once: [`Fault::fail`].
    #[track_caller]
    pub fn fail_at(&self, place: impl Into<Place>) -> Armed {
        self.arm(Fault::fail(place))
    }

    /// Lets a handler panic at a checkpoint, or a loop of the runtime at a point, once: [`Fault::panic`].
    #[track_caller]
    pub fn panic_at(&self, place: impl Into<Place>) -> Armed {
        self.arm(Fault::panic(place))
    }

    /// Lets the node die at a place: see [`crash`](Self::crash).
    #[track_caller]
    pub fn crash_at(&self, place: impl Into<Place>) -> Armed {
        self.arm(Fault::crash(place))
    }

    /// Arms a fault on this node. Arm it before what leads there is emitted.
    #[track_caller]
    #[expect(clippy::must_use_candidate, reason = "it is armed all the same")]
    pub fn arm(&self, fault: Fault) -> Armed {
        let at = Location::caller();
        if let Some(handler) = &fault.handler
            && !matches!(
                fault.place,
                Place::Runtime(Point::BeforeTick | Point::AfterTick)
            )
        {
            self.check_handler(at, handler);
        }
        let trap = Arc::new(Trap {
            place: fault.place,
            deed: fault.deed,
            handler: fault.handler,
            left: Mutex::new(fault.times),
            hits: watch::Sender::new(0),
        });
        self.member.points.arm(Arc::clone(&trap));
        Armed {
            trap,
            points: Arc::clone(&self.member.points),
            at,
        }
    }

    /// The checkpoints that this node's handlers have passed so far, by name.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<String> {
        self.member.points.checkpoints()
    }

    /// Lets the node die where it stands, as if its process had been killed: all its tasks end, its
    /// transactions are rolled back by the server, nothing is given back. What it held comes to another
    /// node when its leases have ended; [`advance`](Self::advance) the clock by the lease (10 s by
    /// default) to see that at once.
    ///
    /// Tasks that handlers have spawned go on, as do those of other nodes in this process. To kill a
    /// process for good, start one.
    pub fn crash(&self) {
        self.member.points.crash();
    }

    /// Whether the node has died.
    #[must_use]
    pub fn has_crashed(&self) -> bool {
        self.member.points.has_crashed()
    }
}
