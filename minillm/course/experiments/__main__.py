"""python -m minillm.course.experiments NAME ..."""

from minillm.course.experiments import main

if __name__ == "__main__":
    main()
