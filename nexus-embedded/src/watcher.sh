# Stops an embedded server some time after its last user is gone; see watcher.rs for the protocol.
# $1 the cluster's folder, $2 $3 pid and start of the server, $4 seconds between looks,
# $5 how many looks without users before it stops.
folder=$1 server=$2 server_started=$3 pause=$4 patience=$5
PATH=${PATH:+$PATH:}/usr/bin:/bin

# Whatever pipes the program that started this one had open must not stay open.
exec 3<&- 4<&- 5<&- 6<&- 7<&- 8<&- 9<&-

# Sets $started for the process $1; empty when it is dead or a zombie. As in process.rs.
look_at() {
    started=
    if [ -r /proc/self/stat ]; then
        { read -r line <"/proc/$1/stat"; } 2>/dev/null || return 0
        set -- ${line##*) }
        case $1 in Z | X) ;; *) started=${20} ;; esac
    else
        set -- $(LC_ALL=C TZ=UTC0 ps -o stat= -o lstart= -ww -p "$1" 2>/dev/null)
        case ${1-} in
            '' | Z*) ;;
            *) shift; IFS=_; started="$*"; unset IFS ;;
        esac
    fi
}

server_is_alive() {
    look_at "$server"
    [ "$started" = "$server_started" ]
}

# Also removes the entries of users that died.
has_users() {
    used=1
    for entry in "$folder"/users/*; do
        name=${entry##*/}
        pid=${name%%-*} rest=${name#*-}
        case $pid in '' | *[!0-9]*) continue ;; esac
        look_at "$pid"
        if [ -n "$started" ] && [ "$started" = "${rest%-*}" ]; then
            used=0
        else
            rm -f "$entry"
        fi
    done
    return $used
}

# Ends this script when there is nothing left for it to watch.
check_folder() {
    if read -r watcher _ watched watched_started <"$folder/watcher"; then
        if [ "$watched $watched_started" = "$server $server_started" ]; then
            [ "$watcher" = $$ ] || exit
            return
        fi
    elif [ -d "$folder" ]; then
        return
    fi
    # The folder was deleted, perhaps made anew. Nobody can find this server any more, and it has
    # no data to save.
    kill -QUIT "$server"
    exit
}

look_at $$
printf '%s\n' "$$ $started $server $server_started" >"$folder/watcher.new"
mv -f "$folder/watcher.new" "$folder/watcher"

idle=0
while server_is_alive; do
    check_folder
    if has_users; then idle=0; else idle=$((idle + 1)); fi
    if [ "$idle" -gt "$patience" ]; then
        printf '' >"$folder/stopping"
        if has_users; then
            rm -f "$folder/stopping"
            idle=0
        else
            kill -INT "$server"
            while server_is_alive; do sleep "$pause" || sleep 1; done
            rm -f "$folder/stopping"
            exit
        fi
    fi
    sleep "$pause" || sleep 1
done
